from milan.convert.interop import main

raise SystemExit(main())
